"""The DeepSeek-V2 family."""
