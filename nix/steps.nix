# The pipeline of one recipe, a derivation a step.
{
  lib,
  runCommand,
  mnist,
  reproml,
}:
recipe:
let
  golden = lib.importJSON ../golden/${recipe}.json;
  run = {
    "recipe.sha256" = golden."recipe.canonical_json.sha256";
    numerics = "exact";
  };

  step =
    name: attributes:
    runCommand "${recipe}-${name}" (
      {
        nativeBuildInputs = [ reproml ];
        REPROML_DATA_DIR = mnist;
        TERM = "dumb"; # plain lines in the build's log
      }
      // attributes
    );
in
rec {
  # In exact arithmetic the weights follow from the recipe alone. So they can be stated before they are
  # computed, as a fixed-output derivation, and Nix refuses a training that comes out different. Once
  # they are there Nix has no reason to train again; `nix build --rebuild` gives it one.
  weights =
    step "weights.safetensors"
      {
        outputHash = golden."weights.safetensors.sha256";
        outputHashAlgo = "sha256";
        outputHashMode = "flat";
      }
      ''
        reproml train --recipe ${recipe} --out run
        cp run/weights.safetensors $out
      '';

  # A run folder needs no more than this to be evaluated.
  evaluation = step "evaluation.json" { } ''
    mkdir run
    ln -s ${weights} run/weights.safetensors
    echo '${builtins.toJSON run}' > run/run.json
    reproml evaluate --recipe ${recipe} --run run --json > $out
  '';

  verify = step "verified" { } ''
    reproml verify --recipe ${recipe}
    touch $out
  '';
}
