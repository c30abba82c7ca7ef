"""Models that run on INT8 linears: Ideogram 4, image generation, and the error of each layer."""
