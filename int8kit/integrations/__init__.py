"""Doors through which other libraries load int8kit's layers. Each is a module that its users import.

import int8kit.integrations.diffusers       "int8kit" becomes a quantizer of diffusers and of transformers
int8kit.pipeline_config()                   the configuration of a whole pipeline; imports that module
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

TRANSFORMERS = ("transformer", "unconditional_transformer")
"""Components of `Ideogram4Pipeline` that run in INT8: one for each branch of the guidance."""


def pipeline_config(
    policy: Sequence[str] | None = None,
    modules_to_not_convert: Sequence[str] = (),
    *,
    components: Sequence[str] = TRANSFORMERS,
) -> Any:
    """The `quantization_config` of `DiffusionPipeline.from_pretrained`: a `PipelineQuantizationConfig` of diffusers.

    policy, modules_to_not_convert: names of linears, as in `int8kit.integrations.diffusers.Int8KitConfig`.
    components: parts of the pipeline to quantize. Raises InputError for an argument of another type.
    """
    from diffusers.quantizers import PipelineQuantizationConfig

    from int8kit.errors import InputError
    from int8kit.integrations.diffusers import Int8KitConfig

    if isinstance(components, str) or not components:
        raise InputError(f"components = {components!r}; expected a list of names, such as ['transformer']")
    configs: Any = {
        name: Int8KitConfig(policy=policy, modules_to_not_convert=modules_to_not_convert) for name in components
    }
    return PipelineQuantizationConfig(quant_mapping=configs)
