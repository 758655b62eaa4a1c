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
    {
        "new_node_id": "LoraLoaderModelOnly",
        "old_node_id": "PixArtLoraLoader",
        "old_widget_ids": ["lora_name", "strength"],
        "input_mapping": [
            {"new_id": "model", "old_id": "model"},
            {"new_id": "lora_name", "old_id": "lora_name"},
            {"new_id": "strength_model", "old_id": "strength"},
        ],
        "output_mapping": [{"new_idx": 0, "old_idx": 0}],
    },
]
