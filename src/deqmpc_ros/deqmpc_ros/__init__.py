"""What every node of the stack shares: parameters, QoS, message types, spinning."""
