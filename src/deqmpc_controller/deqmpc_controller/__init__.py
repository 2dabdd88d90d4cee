"""Policy node: state and obstacles to a plan of T+1 full states."""
