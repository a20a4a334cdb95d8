"""OpenAI's API over an engine: FastAPI and uvicorn. `pip install "latentrt[server]"`."""
