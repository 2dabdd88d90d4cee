"""ROS-free library of the DEQ-MPC flight stack: dynamics, problems, solvers, policies."""
