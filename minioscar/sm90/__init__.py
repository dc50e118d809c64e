"""What Hopper does better, an appendix as kernels/sm90/ is: plans and launches for compute capability 9.0 alone."""
