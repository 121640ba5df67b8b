"""Tasks whose examples are generated: ListOps, Pathfinder, recall and copying."""
