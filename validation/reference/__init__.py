"""What engines are compared with: transformers, audited against formulas."""
