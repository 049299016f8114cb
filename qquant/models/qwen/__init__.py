"""The original Qwen (v1), native to today's transformers: configuration, tokenizer, model and chat."""
