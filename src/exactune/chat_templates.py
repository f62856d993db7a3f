"""Chat templates and conversation formats by the names existing scripts import them under; the code is in `exactune.data`."""

from exactune.data.responses import train_on_responses_only
from exactune.data.sharegpt import standardize_data_formats, standardize_sharegpt, to_sharegpt
from exactune.data.templates import get_chat_template

__all__ = ["get_chat_template", "standardize_data_formats", "standardize_sharegpt", "to_sharegpt", "train_on_responses_only"]
