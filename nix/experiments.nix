# What the flake offers to others, and uses itself: flakes for recipes, and for scripts.
{ lib, forSystems }:
let
  filesIn =
    folder: suffix: lib.filter (lib.hasSuffix suffix) (lib.attrNames (builtins.readDir folder));
  perSystem = lib.mapAttrs (_: forSystems);
in
{
  # Outputs for a folder of recipes (NAME.toml) and one of golden files (NAME.json):
  #
  #     packages   run-NAME, evaluation-NAME, report-NAME; with a golden file weights-NAME
  #     checks     verify-NAME for each golden file
  #     apps       golden, doctor
  mkFlake =
    { recipes, golden }:
    let
      names = map (lib.removeSuffix ".toml") (filesIn recipes ".toml");
      goldenOf =
        name:
        let
          path = golden + "/${name}.json";
        in
        if builtins.pathExists path then path else null;

      recipeOf =
        name:
        let
          path = recipes + "/${name}.toml";
        in
        assert lib.assertMsg (
          (lib.importTOML path).name == name
        ) "recipes/${name}.toml: its name must be ${name}, as golden/${name}.json has it";
        path;
      missing = lib.filter (name: goldenOf name == null) names;

      stepsIn =
        pkgs:
        lib.genAttrs names (
          name:
          pkgs.stepsOf {
            inherit name;
            recipe = recipeOf name;
            golden = goldenOf name;
          }
        );
      # { digits-mlp = { run = …; verify = …; }; } -> { run-digits-mlp = …; verify-digits-mlp = …; }
      flat = lib.concatMapAttrs (name: lib.mapAttrs' (step: lib.nameValuePair "${step}-${name}"));
    in
    perSystem {
      packages = pkgs: flat (lib.mapAttrs (_: steps: removeAttrs steps [ "verify" ]) (stepsIn pkgs));
      checks =
        pkgs:
        flat (lib.mapAttrs (_: steps: builtins.intersectAttrs { verify = null; } steps) (stepsIn pkgs));
      apps = pkgs: {
        doctor = pkgs.appOf "doctor" "Test the assumptions of exact arithmetic on this machine";
        golden =
          let
            one = pkgs.appOf "golden" "Train and write golden files, by default those that are missing";
          in
          one
          // {
            program = "${pkgs.writeShellScript "reproml-golden-files" ''
              set -e
              [ $# = 0 ] || exec ${one.program} "$@"
              ${lib.optionalString (missing == [ ]) ''
                echo "every recipe has a golden file; to replace one: --force --recipe RECIPE"
              ''}
              for recipe in ${toString (map (name: "${recipeOf name}") missing)}; do
                ${one.program} --recipe $recipe
              done
            ''}";
          };
      };
    };

  # Outputs for a training script of plain PyTorch: the check runs it, in a copy of its folder, and compares
  # what it trained and saved with `digest`, a SHA-256 as `reproml run` prints it, or a list of several.
  mkScript =
    {
      script,
      digest,
      arguments ? "",
    }:
    let
      verified =
        pkgs:
        pkgs.runCommand "verified-${baseNameOf script}" { nativeBuildInputs = [ pkgs.reproml.without ]; } ''
          export HOME="$TMPDIR" TERM=dumb
          cp -r ${
            builtins.path {
              path = dirOf script;
              name = "script";
            }
          } folder && chmod -R u+w folder && cd folder
          reproml run --digest $out ${baseNameOf script} ${arguments}
          python ${./digests.py} $out ${toString (lib.toList digest)}
        '';
    in
    perSystem {
      packages = pkgs: { default = verified pkgs; };
      checks = pkgs: { verify = verified pkgs; };
    };
}
