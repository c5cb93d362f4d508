"""The graphs that onnxruntime-genai runs in the place of ours.

It gives features of images to the graph that embeds, and knows nothing of types of tokens:

    ours    input_ids -> inputs_embeds            inputs_embeds, token_type_ids, ... -> logits
    genai   input_ids, image_features             inputs_embeds, input_ids, ...
              -> inputs_embeds                      -> logits

Each is the emitted graph with a few operations more. Weights stay in the data files that the emitted graphs read.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from vlmopt.core.program import PAST, Generation, Program
from vlmopt.emit.written import appearing
from vlmopt.graph.assembled import DECODER, EMBEDDING, VISION

# `model_type` of a configuration -> the type that runs it there, of those whose images have one size
GENAI_TYPES = {"gemma3": "gemma3"}
GENAI_EMBEDDING, GENAI_DECODER = "genai_embedding", "genai_decoder"
TYPES, IDS = "token_type_ids", "input_ids"

# Features are counted over all prompts. A place behind the last of them, for instance of a token that the model wrote,
# keeps the embedding of the token: row 0, which is padding, stands for it.
_PLACING = """
placing (int64[batch_size, sequence] input_ids, float[batch_size, sequence, {width}] placing_tokens,
         float[features, {width}] image_features)
    => (float[batch_size, sequence, {width}] inputs_embeds)
{{
    placing_mark = Constant <value_int: int = {image_token}> ()
    placing_zero = Constant <value_int: int = 0> ()
    placing_flat = Constant <value_ints: ints = [-1]> ()
    placing_wide = Constant <value_ints: ints = [-1, {width}]> ()
    placing_pads = Constant <value_ints: ints = [1, 0, 0, 0]> ()
    placing_features = Reshape (image_features, placing_wide)
    placing_rows = Pad (placing_features, placing_pads)
    placing_n = Shape <start: int = 0, end: int = 1> (placing_features)
    placing_is_mark = Equal (input_ids, placing_mark)
    placing_marks = Cast <to: int = 7> (placing_is_mark)
    placing_line = Reshape (placing_marks, placing_flat)
    placing_count = CumSum (placing_line, placing_zero)
    placing_rank = Mul (placing_count, placing_line)
    placing_is_fed = LessOrEqual (placing_rank, placing_n)
    placing_of_line = Where (placing_is_fed, placing_rank, placing_zero)
    placing_shape = Shape (input_ids)
    placing_row = Reshape (placing_of_line, placing_shape)
    placing_images = Gather (placing_rows, placing_row)
    placing_is_image = Greater (placing_row, placing_zero)
    placing_everywhere = Unsqueeze (placing_is_image, placing_flat)
    inputs_embeds = Where (placing_everywhere, placing_images, placing_tokens)
}}
"""
_TYPING = """
typing (int64[batch_size, sequence] input_ids) => (int64[batch_size, sequence] token_type_ids)
{{
    typing_mark = Constant <value_int: int = {image_token}> ()
    typing_image = Constant <value_int: int = {image}> ()
    typing_text = Constant <value_int: int = {text}> ()
    typing_is_image = Equal (input_ids, typing_mark)
    token_type_ids = Where (typing_is_image, typing_image, typing_text)
}}
"""


def runs_in_genai(program: Program) -> bool:
    """Whether onnxruntime-genai has a type for the program, and passes left it what its configuration can state.

    There is one number of heads and one width for all layers, the cache holds keys and values alone (phantom dimensions
    keep a query), an answer's tokens are typed as the prompt's, and an image has as many places as the original's,
    which genai writes whatever a file says.
    """
    generation = program.generation
    if generation is None or program.source.model_type not in GENAI_TYPES or generation.processor_tokens:
        return False
    if not {VISION, EMBEDDING, DECODER} <= program.components.keys():  # a part of a program that is looked at alone
        return False
    cached = [spec.name for spec in program.components[DECODER].inputs if spec.name.startswith(PAST)]
    if not all(name.endswith(("_key", "_value")) for name in cached):
        return False
    types = generation.token_types
    return len(cache_shapes(program)) == 1 and (types is None or types[0] == types[2])


def cache_shapes(program: Program) -> set[tuple[int | str, int | str]]:
    """Heads and width of the decoder's keys and values."""
    inputs = program.components[DECODER].inputs
    return {(spec.shape[1], spec.shape[3]) for spec in inputs if len(spec.shape) == 4}


def decoder_file(generation: Generation) -> str:
    """The decoder that genai runs: ours, unless it reads types of tokens."""
    return f"{DECODER if generation.token_types is None else GENAI_DECODER}.onnx"


def write_genai_graphs(program: Program, folder: Path) -> None:
    """Writes the graphs into `folder`, where the emitted ones lie with their weights in data files.

    Raises:
        VlmoptError: the files cannot be written.
    """
    generation = program.generation
    assert generation is not None
    _write(_placing(program, generation, folder / f"{EMBEDDING}.onnx"), folder / f"{GENAI_EMBEDDING}.onnx")
    if generation.token_types is not None:
        typed = _typed(generation, generation.token_types, folder / f"{DECODER}.onnx")
        _write(typed, folder / f"{GENAI_DECODER}.onnx")


def _placing(program: Program, generation: Generation, source: Path) -> onnx.ModelProto:
    """The embedding behind which features of images take their places. `image_features` has no stated rank: genai gives
    [N, F, D] for N images, and [0, D] where there is none. ONNX's own checker wants a rank, so it is not asked; ONNX
    Runtime is."""
    model = onnx.load(source, load_external_data=False)
    (embeds,) = model.graph.output
    for node in model.graph.node:
        node.output[:] = ["placing_tokens" if name == embeds.name else name for name in node.output]
    width = program.components[EMBEDDING].outputs[0].shape[-1]
    text = _PLACING.format(width=width, image_token=generation.image_token)
    model.graph.node.extend(onnx.parser.parse_graph(text).node)
    features = onnx.helper.make_tensor_value_info("image_features", embeds.type.tensor_type.elem_type, None)
    model.graph.input.append(features)
    return model


def _typed(generation: Generation, types: tuple[int, int, int], source: Path) -> onnx.ModelProto:
    """The decoder that finds the types of tokens itself. What it hid of an answer's image tokens is nothing: a token
    that stands alone sees itself and the past, whatever its type."""
    model = onnx.load(source, load_external_data=False)
    text, image, _ = types
    made = onnx.parser.parse_graph(_TYPING.format(image_token=generation.image_token, image=image, text=text)).node
    nodes = [*made, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    (given,) = (value for value in model.graph.input if value.name == TYPES)
    given.name = IDS
    return model


def _write(model: onnx.ModelProto, path: Path) -> None:
    with appearing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())
