"""GGUF files of a model folder, for llama.cpp and what is built on it.

    from herdling.export.gguf import text, vision, writing
    writing.write("model.gguf", *text.model(folder, "q8_0"))
    writing.write("mmproj-model.gguf", *vision.projector(folder))

A decoder, a vision projector and a LoRA adapter are three files, as llama.cpp wants them. What it
would compute otherwise than this model does is in `limits`. Left out: K-quants, which its own
`llama-quantize` makes from an F16 file, and splitting a file into parts.
"""
