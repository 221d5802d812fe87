"""Evaluators of random weights and small sizes, as directories that transformers loads."""

import json
import pathlib

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
import torch
import transformers


def _save(model, directory):
  torch.manual_seed(0)
  model.eval().save_pretrained(directory)
  return pathlib.Path(directory)


def clip_tokenizer(directory, context=16):
  """Letters as tokens, with CLIP's two ends."""
  letters = [chr(i) for i in range(33, 127)]
  vocab = {}
  for letter in letters:
    vocab[letter] = len(vocab)
    vocab[f'{letter}</w>'] = len(vocab)
  for special in ('<|startoftext|>', '<|endoftext|>'):
    vocab[special] = len(vocab)
  (directory / 'vocab.json').write_text(json.dumps(vocab))
  (directory / 'merges.txt').write_text('#version: 0.2\n')
  made = transformers.CLIPTokenizer(str(directory / 'vocab.json'), str(directory / 'merges.txt'))
  made.model_max_length = context
  made.save_pretrained(directory)
  return len(vocab)


def clip(directory, context=16):
  directory.mkdir()
  vocab = clip_tokenizer(directory, context)
  torch.manual_seed(1)
  text = {
    'vocab_size': vocab,
    'hidden_size': 16,
    'intermediate_size': 32,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'max_position_embeddings': context,
    'bos_token_id': vocab - 2,
    'eos_token_id': vocab - 1,
  }
  vision = {
    'hidden_size': 16,
    'intermediate_size': 32,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'image_size': 32,
    'patch_size': 8,
  }
  config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
  return _save(transformers.CLIPModel(config), directory)


def mask2former(directory, classes=5):
  torch.manual_seed(2)
  backbone = transformers.SwinConfig(
    embed_dim=8,
    depths=[1, 1, 1, 1],
    num_heads=[1, 2, 2, 2],
    window_size=4,
    image_size=64,
    out_features=['stage1', 'stage2', 'stage3', 'stage4'],
  )
  config = transformers.Mask2FormerConfig(
    backbone_config=backbone,
    num_labels=classes,
    hidden_dim=32,
    feature_size=32,  # its norms have 32 groups
    mask_feature_size=32,
    encoder_layers=1,
    decoder_layers=2,
    num_attention_heads=2,
    encoder_feedforward_dim=32,
    dim_feedforward=32,
    num_queries=9,
  )
  return _save(transformers.Mask2FormerForUniversalSegmentation(config), directory)


def blip(directory):
  directory.mkdir()
  words = [f'[unused{i}]' for i in range(30524)]
  named = {
    0: '[PAD]',
    100: '[UNK]',
    101: '[CLS]',
    102: '[SEP]',
    1037: 'a',
    2417: 'red',
    3899: 'dog',
  }
  named |= {2748: 'yes', 2053: 'no', 1029: '?', 30522: '[DEC]', 30523: '[ENC]'}
  for place, word in named.items():
    words[place] = word
  tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token='[UNK]'))
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.decoder = decoders.WordPiece()
  tokenizer.post_processor = processors.TemplateProcessing(
    single='[CLS] $A [SEP]', special_tokens=[('[CLS]', 101), ('[SEP]', 102)]
  )
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    pad_token='[PAD]',
    cls_token='[CLS]',
    sep_token='[SEP]',
    unk_token='[UNK]',
  ).save_pretrained(directory)
  text = {
    'vocab_size': 30524,
    'hidden_size': 16,
    'encoder_hidden_size': 16,
    'intermediate_size': 32,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'max_position_embeddings': 64,
  }
  vision = {
    'hidden_size': 16,
    'intermediate_size': 32,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'image_size': 32,
    'patch_size': 8,
  }
  torch.manual_seed(3)
  config = transformers.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=8)
  return _save(transformers.BlipForQuestionAnswering(config), directory)


def owlv2(directory):
  directory.mkdir()
  vocab = clip_tokenizer(directory)
  text = {
    'vocab_size': vocab,
    'hidden_size': 16,
    'intermediate_size': 32,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'max_position_embeddings': 16,
    'bos_token_id': vocab - 2,
    'eos_token_id': vocab - 1,
  }
  vision = {
    'hidden_size': 16,
    'intermediate_size': 32,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'image_size': 32,
    'patch_size': 8,
  }
  torch.manual_seed(4)
  config = transformers.Owlv2Config(text_config=text, vision_config=vision, projection_dim=16)
  transformers.Owlv2Processor(
    image_processor=transformers.Owlv2ImageProcessorPil(size={'height': 32, 'width': 32}),
    tokenizer=transformers.AutoTokenizer.from_pretrained(directory),
  ).save_pretrained(directory)
  return _save(transformers.Owlv2ForObjectDetection(config), directory)
