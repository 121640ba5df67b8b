"""Tasks whose examples are generated: ListOps and Pathfinder."""
