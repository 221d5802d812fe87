"""Show-o in and out: a model, showlab/magvitv2 and Phi-1.5's tokenizer, as the Hub has them or in
one directory.
"""
