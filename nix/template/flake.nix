{
  description = "A training that anybody can repeat, to the last bit";

  # flake.lock has its address: nix flake lock --override-input reproml ADDRESS
  inputs.reproml.url = "flake:reproml";

  outputs =
    { reproml, ... }:
    reproml.lib.mkFlake {
      recipes = ./recipes;
      golden = ./golden;
    };
}
