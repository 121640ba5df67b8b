"""004: gates, routers, balance and sizes of a union, one change at a time."""
