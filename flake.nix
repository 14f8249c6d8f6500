{
  description = "Deep learning that comes out the same, to the last bit, on any machine";

  # Python 3.9 left nixpkgs in spring 2025: this is one of the last revisions that have it.
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/1e5b653dff12029333a6546c11e108ede13052eb";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;

      # A recipe in reproml/pipeline/recipes with a golden file gets its packages and its check from that. A golden
      # file alone belongs to a recipe that lies elsewhere.
      recipes = lib.filter (recipe: builtins.pathExists (./reproml/pipeline/recipes + "/${recipe}.toml")) (
        map (lib.removeSuffix ".json") (
          lib.filter (lib.hasSuffix ".json") (lib.attrNames (builtins.readDir ./golden))
        )
      );

      outputsOf =
        system:
        let
          pkgs = nixpkgs.legacyPackages.${system};
          mnist = pkgs.callPackage ./nix/mnist.nix { };
          python = pkgs.callPackage ./nix/python.nix { };
          reproml = pkgs.callPackage ./nix/reproml.nix { inherit python; };
          steps = lib.genAttrs recipes (pkgs.callPackage ./nix/steps.nix { inherit mnist reproml; });

          hasCuda = system == "x86_64-linux";
          pythonCuda = python.override { cuda = true; };

          # "weights" -> { weights-digits-mlp = ...; weights-mnist-mlp = ...; }
          forRecipes = step: lib.mapAttrs' (name: of: lib.nameValuePair "${step}-${name}" of.${step}) steps;

          shell =
            python:
            pkgs.mkShell {
              packages = [
                python
                pkgs.nixfmt-rfc-style
              ];
              REPROML_DATA_DIR = mnist;
              # The working tree is imported in place, its kernels compiled into it.
              shellHook = ''
                export PYTHONPATH="$PWD''${PYTHONPATH:+:$PYTHONPATH}"
                python setup.py --quiet build_ext --inplace
              '';
            };

          app = verb: description: {
            type = "app";
            program = toString (
              pkgs.writeShellScript "reproml-${verb}" ''
                export REPROML_DATA_DIR="''${REPROML_DATA_DIR:-${mnist}}"
                exec ${reproml}/bin/reproml ${verb} "$@"
              ''
            );
            meta = { inherit description; };
          };

          # Run a command in a copy of the sources, the kernels compiled in place.
          inSources =
            name: command:
            pkgs.runCommandCC name
              {
                nativeBuildInputs = [
                  python
                  pkgs.nixfmt-rfc-style
                ];
                REPROML_DATA_DIR = mnist;
                REPROML_MIRROR = mnist;
                PYTHONDONTWRITEBYTECODE = 1;
              }
              ''
                cp -r ${self} sources
                chmod -R u+w sources
                cd sources
                export HOME="$TMPDIR" PYTHONPATH="$PWD"
                python setup.py --quiet build_ext --inplace
                ${command}
                touch $out
              '';
        in
        {
          packages =
            {
              inherit mnist;
              default = reproml;
            }
            // forRecipes "weights"
            // forRecipes "evaluation"
            // lib.optionalAttrs hasCuda {
              cuda = reproml.override { python = pythonCuda; };
            };

          devShells = {
            default = shell python;
          } // lib.optionalAttrs hasCuda { cuda = shell pythonCuda; };

          apps = {
            pipeline = app "pipeline" "Get the data, train, evaluate, verify";
            verify = app "verify" "Train and compare all of it with the golden file";
          };

          checks = forRecipes "verify" // {
            tests = inSources "tests" "pytest";
            # That requirements.lock, nix/wheels.json, flake.lock, recipes and golden files agree.
            lock = inSources "lock" "pytest tests/test_flake.py";
            lint = inSources "lint" "invoke lint && nixfmt --check flake.nix nix/*.nix";
            matrix-digits-mlp = inSources "matrix-digits-mlp" "invoke matrix --recipe digits-mlp";
          };
        };

      outputs = lib.genAttrs [
        "aarch64-darwin"
        "aarch64-linux"
        "x86_64-linux"
      ] outputsOf;
    in
    lib.genAttrs [
      "packages"
      "devShells"
      "apps"
      "checks"
    ] (kind: lib.mapAttrs (_: of: of.${kind}) outputs);
}
