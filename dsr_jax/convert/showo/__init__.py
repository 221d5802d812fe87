"""Imports and exports Show-o: a model, showlab/magvitv2 and Phi-1.5's tokenizer, as separate Hub
repositories or in one directory.
"""
