"""What Hopper does better, an appendix as kernels/sm90/ is; launches go this way on newer cards, too."""
