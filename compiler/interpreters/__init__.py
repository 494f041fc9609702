"""What a formula means once there is a model: numbers, affine maps, nodes of a graph."""
