#!/usr/bin/env python3
"""Write an Ideogram 4 pipeline of full size with random weights, for `int8kit run --model DIR`.

    python tools/full_size_pipeline.py DIR        # 40 GB; int8kit run --model DIR --size 1024x1024 --steps 4

Both transformers and the VAE are the real classes with their default configurations, in bf16. The text encoder has the
real width and depth, which decide the shape of the text features, and narrow feed-forward layers. A GPU builds it
faster. --layers makes the transformers shallower, for a test on a small machine.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, Ideogram4Transformer2DModel
from transformers import Qwen3VLConfig, Qwen3VLModel

from int8kit import models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=34)
    args = parser.parse_args()
    pipe = models.tiny_pipeline()
    text = {
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 8,
        "head_dim": 128,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "vocab_size": len(pipe.tokenizer),
    }
    vision = {**pipe.text_encoder.config.vision_config.to_dict(), "out_hidden_size": 4096}
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    pipe.save_pretrained(args.folder)

    def write(name: str, build) -> None:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            part = build()
        part.save_pretrained(args.folder / name, max_shard_size="4GB")
        print(f"{name}: {sum(p.numel() for p in part.parameters()) / 1e9:.2f} billion parameters", flush=True)

    write("vae", AutoencoderKLFlux2)
    write("text_encoder", lambda: Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)))
    for name in ("transformer", "unconditional_transformer"):
        write(name, lambda: Ideogram4Transformer2DModel(num_layers=args.layers))


if __name__ == "__main__":
    main()
