"""Checkpoints (format v1): each rank saves its slices, an index maps logical tensors to bytes, any topology loads them.

A run directory holds::

    checkpoints/latest                      name of the newest checkpoint, for people and tools
    checkpoints/step-00000100/
        manifest.json                       written last: size, sha256 and a hash per 4 MiB chunk of every file; its own hash
        index.json                          logical tensors (name, shape), how ranks cut them, the files
        index.safetensors                   one row per stored piece: tensor, kind, cut, range, file, byte offset, dtype
        state.json                          step, position in the data, topology, fingerprints, model and recipe
        rank-00000.safetensors ...          fp32 masters and Adam moments, as this rank held them
    frozen/<hash>/                          weights that do not train, stored once and referenced by manifests

A directory under its final name is complete. Nothing is unpickled, and nothing here knows DeepSpeed or the model.
"""
