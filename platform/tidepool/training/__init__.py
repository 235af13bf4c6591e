"""Training: the step loop, its exact reduction, and its shells on Ray Train (`ray_worker`, `driver`)."""
