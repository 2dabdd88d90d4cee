"""NatNet (OptiTrack) rigid body to pose and odometry."""
