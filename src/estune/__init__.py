"""Full-parameter fine-tuning of language models with Evolution Strategies."""
