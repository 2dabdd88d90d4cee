"""What every node of the stack shares: parameters into a dataclass, QoS, message types, spinning and shutdown."""
