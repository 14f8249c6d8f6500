{
  description = "Deep learning that comes out the same, to the last bit, on any machine";

  # Python 3.9 left nixpkgs in spring 2025: this is one of the last revisions that have it.
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/1e5b653dff12029333a6546c11e108ede13052eb";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;

      systems = [
        "aarch64-darwin"
        "aarch64-linux"
        "x86_64-linux"
      ];
      hasCuda = system: system == "x86_64-linux";

      # The packages of nixpkgs with ours: environments, reproml, mnist, stepsOf, appOf, image.
      scopeOf =
        cuda: system:
        let
          pkgs =
            if cuda then
              import nixpkgs {
                inherit system;
                config.allowUnfreePredicate = package: lib.hasSuffix "-cuda" (lib.getName package);
              }
            else
              nixpkgs.legacyPackages.${system};
        in
        pkgs
        // lib.fix (ours: {
          callPackage = lib.callPackageWith (pkgs // ours);
          callPackages = lib.callPackagesWith (pkgs // ours);
          environments = ours.callPackage ./nix/python.nix { inherit cuda; };
          reproml = ours.callPackage ./nix/reproml.nix { };
          mnist = ours.callPackage ./nix/mnist.nix { };
          stepsOf = ours.callPackage ./nix/steps.nix { };
          appOf = ours.callPackage ./nix/app.nix { };
          image = ours.callPackage ./nix/image.nix { inherit cuda; };
        });

      # An output for each system, from the function that makes it of a system's packages.
      forSystems = outputOf: lib.genAttrs systems (system: outputOf (scopeOf false system));

      experiments = import ./nix/experiments.nix { inherit lib forSystems; };
      ours = experiments.mkFlake {
        recipes = ./reproml/pipeline/recipes;
        golden = ./golden;
      };
      template = experiments.mkFlake {
        recipes = ./nix/template/recipes;
        golden = ./nix/template/golden;
      };
      script = experiments.mkScript {
        script = ./examples/mlp.py;
        arguments = "--steps 2";
        digest = (lib.importJSON ./tests/examples.json).mlp;
      };
    in
    {
      lib = { inherit (experiments) mkFlake mkScript; };

      templates.default = {
        path = ./nix/template;
        description = "A training of your own: a recipe, its golden file, and a check";
        welcomeText = ''
          Next, with ADDRESS as you gave it to `nix flake init -t`:

              nix flake lock --override-input reproml ADDRESS
              nix flake check

          In a git repository run `git add .` first, because Nix sees only files that git knows.
        '';
      };

      packages = lib.genAttrs systems (
        system:
        let
          pkgs = scopeOf false system;
          cuda = scopeOf true system;
        in
        ours.packages.${system}
        // {
          inherit (pkgs) mnist;
          default = pkgs.reproml.overrideAttrs {
            passthru = pkgs.reproml.passthru // {
              tests = self.checks.${system};
            };
          };
        }
        // lib.optionalAttrs pkgs.stdenv.hostPlatform.isLinux { inherit (pkgs) image; }
        // lib.optionalAttrs (hasCuda system) {
          cuda = cuda.reproml;
          image-cuda = cuda.image;
        }
      );

      devShells = lib.genAttrs systems (
        system:
        lib.mapAttrs (_: cuda: (scopeOf cuda system).callPackage ./nix/shell.nix { }) (
          { default = false; } // lib.optionalAttrs (hasCuda system) { cuda = true; }
        )
      );

      apps = forSystems (
        pkgs:
        ours.apps.${pkgs.stdenv.hostPlatform.system}
        // {
          pipeline = pkgs.appOf "pipeline" "Get the data, train, evaluate, verify";
          verify = pkgs.appOf "verify" "Train and compare all of it with the golden file";
        }
      );

      # Everything that is offered without a GPU is built by a check.
      checks = forSystems (
        pkgs:
        let
          inherit (pkgs.stdenv.hostPlatform) system;
          prefixed = prefix: lib.mapAttrs' (name: lib.nameValuePair "${prefix}-${name}");
        in
        removeAttrs self.packages.${system} [
          "cuda"
          "image-cuda"
        ]
        // ours.checks.${system}
        // prefixed "template" (template.checks.${system} // template.packages.${system})
        // prefixed "script" script.checks.${system}
        // {
          shell = self.devShells.${system}.default;
        }
        // pkgs.callPackages ./nix/checks.nix {
          source = self;
          format = self.formatter.${system};
        }
      );

      formatter = forSystems (
        pkgs:
        pkgs.writeShellScriptBin "format" ''
          exec ${lib.getExe pkgs.nixfmt-rfc-style} "$@" flake.nix nix/*.nix nix/template/*.nix
        ''
      );
    };
}
