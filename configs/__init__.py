"""What a run is: the schema, and how a YAML file becomes one. Imports neither torch nor anything else of ours."""
