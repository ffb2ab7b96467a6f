"""What a loader on the spheres is made of; `torch_spheres.loader` puts it together."""
