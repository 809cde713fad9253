"""Where problems and trajectories come from: files, directories and hub sets in their published layouts."""
