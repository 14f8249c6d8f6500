{
  description = "A training that anybody can repeat, to the last bit";

  # Nix looks `flake:reproml` up in its registry (`nix registry add reproml ADDRESS`); flake.lock then pins it.
  inputs.reproml.url = "flake:reproml";

  outputs =
    { reproml, ... }:
    reproml.lib.mkFlake {
      recipes = ./recipes;
      golden = ./golden;
    };
}
