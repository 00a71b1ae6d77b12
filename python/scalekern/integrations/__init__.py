"""Other libraries' objects on scalekern's ops. Nothing here imports those libraries before it is asked to."""
