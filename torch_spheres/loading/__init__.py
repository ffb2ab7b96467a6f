"""What a wrapped loader is made of; `torch_spheres.loader` puts it together."""
