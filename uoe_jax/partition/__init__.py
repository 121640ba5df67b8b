"""Where arrays live: device meshes and their layouts."""
