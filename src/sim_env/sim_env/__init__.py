"""Simulated Crazyflie and OptiTrack that speak the real wire protocols; virtual obstacles."""
