"""Fine-tuning tasks: XNLI and question answering."""
