"""What takes the place of ComfyUI_ExtraModels' nodes in a workflow that was made with them.

Only nodes with a counterpart of the same meaning are listed. ExtraModels' resolution node calls the height "width"
and the width "height"; ours does not, so its outputs are connected crosswise, which keeps every picture as it was.
"""

LOADER_DEFAULTS = [
    {"new_id": "family", "set_value": "auto"},
    {"new_id": "base_size", "set_value": "auto"},
    {"new_id": "weight_dtype", "set_value": "auto"},
    {"new_id": "weights", "set_value": "ema if present"},
]

TEXT_DEFAULTS = [
    {"new_id": "family", "set_value": "alpha"},
    {"new_id": "unconditional", "set_value": "prompt"},
    {"new_id": "clean", "set_value": "auto"},
    {"new_id": "token_limit", "set_value": 0},
    {"new_id": "one_prompt_per_line", "set_value": False},
    {"new_id": "width", "set_value": 0},
    {"new_id": "height", "set_value": 0},
]

REPLACEMENTS = [
    {
        "new_node_id": "PixArtLoadModel",
        "old_node_id": "PixArtCheckpointLoader",
        "old_widget_ids": ["ckpt_name", "model"],
        "input_mapping": [{"new_id": "model_name", "old_id": "ckpt_name"}, *LOADER_DEFAULTS],
        "output_mapping": [{"new_idx": 0, "old_idx": 0}],
    },
    {
        "new_node_id": "PixArtLoadModel",
        "old_node_id": "PixArtCheckpointLoaderSimple",
        "old_widget_ids": ["ckpt_name"],
        "input_mapping": [{"new_id": "model_name", "old_id": "ckpt_name"}, *LOADER_DEFAULTS],
        "output_mapping": [{"new_idx": 0, "old_idx": 0}],
    },
    {
        "new_node_id": "PixArtResolution",
        "old_node_id": "PixArtResolutionSelect",
        "old_widget_ids": ["model", "ratio"],
        "input_mapping": [
            {"new_id": "table", "set_value": "1024"},
            {"new_id": "aspect_ratio", "old_id": "ratio"},
            {"new_id": "batch_size", "set_value": 1},
        ],
        "output_mapping": [{"new_idx": 1, "old_idx": 0}, {"new_idx": 0, "old_idx": 1}],
    },
    *(
        {
            "new_node_id": "PixArtTextEncode",
            "old_node_id": old,
            "old_widget_ids": ["text"],
            "input_mapping": [
                {"new_id": "clip", "old_id": "T5"},
                {"new_id": "text", "old_id": "text"},
                *TEXT_DEFAULTS,
            ],
            "output_mapping": [{"new_idx": 0, "old_idx": 0}],
        }
        for old in ("PixArtT5TextEncode", "T5TextEncode")
    ),
    {
        "new_node_id": "PixArtLoadT5",
        "old_node_id": "T5v11Loader",
        "old_widget_ids": ["t5v11_name", "t5v11_ver", "path_type", "device", "dtype"],
        "input_mapping": [
            {"new_id": "t5_name", "old_id": "t5v11_name"},
            {"new_id": "dtype", "set_value": "auto"},
            {"new_id": "device", "set_value": "default"},
        ],
        "output_mapping": [{"new_idx": 0, "old_idx": 0}],
    },
    {
        "new_node_id": "PixArtLoadLora",
        "old_node_id": "PixArtLoraLoader",
        "old_widget_ids": ["lora_name", "strength"],
        "input_mapping": [
            {"new_id": "model", "old_id": "model"},
            {"new_id": "lora_name", "old_id": "lora_name"},
            {"new_id": "strength", "old_id": "strength"},
            {"new_id": "alpha", "set_value": 0.0},
        ],
        "output_mapping": [{"new_idx": 0, "old_idx": 0}],
    },
]
