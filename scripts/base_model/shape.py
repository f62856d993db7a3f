"""The shapes that the base model may have: Llama, tied embeddings, every width a multiple of 256 so that K-quants fit its rows."""

from pathlib import Path

CONTEXT = 512
SHAPES = {
    "wide4": {"num_hidden_layers": 4, "intermediate_size": 768, "num_key_value_heads": 4},
    "deep6": {"num_hidden_layers": 6, "intermediate_size": 512, "num_key_value_heads": 2},
}


def new_model(shape: str, tokenizer_folder: Path):
    """A `LlamaForCausalLM` with fresh weights (float32), fitted to the tokenizer in `tokenizer_folder`."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_attention_heads=8,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPES[shape],
    )
    return LlamaForCausalLM(config)
