"""The thin runtime: `linear` (an INT8 nn.Linear), `ideogram4` (its pipeline on INT8 linears), `generate` (an image)."""
