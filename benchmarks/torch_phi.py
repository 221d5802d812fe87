"""transformers' Phi as Show-o uses it: norms on queries and keys, an untied head."""

from transformers import PhiConfig, PhiForCausalLM


def language_model(*, rows, width, inner, layers, heads) -> PhiForCausalLM:
  """A random one. rows: of the vocabulary, image codes included; inner: width inside the MLP."""
  return PhiForCausalLM(
    PhiConfig(
      vocab_size=rows,
      hidden_size=width,
      intermediate_size=inner,
      num_hidden_layers=layers,
      num_attention_heads=heads,
      qk_layernorm=True,
      tie_word_embeddings=False,
      bos_token_id=None,
      eos_token_id=None,
      pad_token_id=None,
    )
  ).eval()
