"""Configuration of a checkpoint target: URI, options, environment, and hints about mistakes in them."""
