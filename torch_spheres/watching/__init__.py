"""What `KissingSpheres.live` and notebooks show of the spheres."""
