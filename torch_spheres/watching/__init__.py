"""What `KissingSpheres.live`, `torch_spheres.top` and notebooks show, and how."""
