"""Every architecture that can be imported and exported, by class name, and every quantisation that can be unpacked."""

from collections.abc import Callable
from typing import Any

from llmjax.interop import decoder, encdec, encoder, moe
from llmjax.interop.mapping import Architecture
from llmjax.interop.quantised import Fp8Blocks, Mxfp4

# One line a family. Where several classes express a model, the first is the one that is exported.
FAMILIES: dict[str, dict[str, Architecture]] = {
    "decoder": decoder.ARCHITECTURES,
    "moe": moe.ARCHITECTURES,
    "encoder": encoder.ARCHITECTURES,
    "encdec": encdec.ARCHITECTURES,
}
ARCHITECTURES = {name: found for family in FAMILIES.values() for name, found in family.items()}

# Names that files of the first releases have for a class.
OLD_NAMES = {"T5WithLMHeadModel": "T5ForConditionalGeneration", "LLaMAForCausalLM": "LlamaForCausalLM"}

# quantization_config's quant_method -> a maker, given the quantization_config, of an object with
#   shapes(shapes on disk: name -> shape) -> name -> shape of the unpacked tensors
#   parts(name) -> tensor on disk that `name` is packed into -> types that it may have
#   dequantise(name, get_tensor) -> float32 array of the unpacked tensor `name`, or None where it lies on disk as it is;
#                                  get_tensor(name) reads a tensor of the disk
QUANTISATIONS: dict[str, Callable[[dict[str, Any]], Any]] = {"mxfp4": Mxfp4, "fp8": Fp8Blocks}
