# The pipeline of one recipe, a derivation for each step. `golden` is null for a recipe without a golden file.
{
  lib,
  runCommand,
  mnist,
  reproml,
}:
{
  name,
  recipe,
  golden,
}:
let
  step =
    kind: attributes: command:
    runCommand "${name}-${kind}"
      (
        {
          nativeBuildInputs = [ reproml.without ];
          REPROML_DATA_DIR = mnist;
          meta = {
            inherit (reproml.meta) license platforms;
            description = "${kind} of the recipe ${name}";
          };
        }
        // attributes
      )
      ''
        export HOME="$TMPDIR" TERM=dumb # plain lines in the build's log
        ln -s ${recipe} ${name}.toml
        ${command}
      '';
  withGolden =
    kind: command:
    step kind { } ''
      ${lib.optionalString (golden != null) "mkdir golden && cp ${golden} golden/${name}.json"}
      ln -s ${run} run
      ${command}
    '';

  # An ordinary derivation without network: it is trained again when the code or the recipe changes, and
  # `nix build --rebuild` audits it. It depends on no golden file.
  run = step "run" { } ''
    reproml train --recipe ${name}.toml --out run
    python ${./portable_run.py} run $out
  '';
in
{
  inherit run;

  # The outputs name the run as the command does: by a relative path.
  evaluation = step "evaluation.json" { } ''
    ln -s ${run} run
    reproml evaluate --recipe ${name}.toml --run run --json > $out
  '';
  report = withGolden "report.html" "reproml report --recipe ${name}.toml --run run --out $out";
}
// lib.optionalAttrs (golden != null) {
  # In exact arithmetic the weights follow from the recipe alone. So a fixed-output derivation can state
  # their hash in advance: Nix refuses other weights, and their store path is the same on every system.
  weights =
    step "weights.safetensors"
      {
        outputHash = (lib.importJSON golden)."weights.safetensors.sha256";
        outputHashAlgo = "sha256";
        outputHashMode = "flat";
      }
      ''
        cp ${run}/weights.safetensors $out
      '';

  verify = withGolden "verified" "reproml verify --recipe ${name}.toml --run run | tee $out";
}
