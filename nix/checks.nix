# Tests and lint, each in a copy of the files that it reads.
{
  lib,
  runCommand,
  runCommandCC,
  git,
  environments,
  reproml,
  mnist,
  source,
  format,
}:
let
  root = ../.;
  union = lib.fileset.unions;

  inCopy =
    name: files: command:
    runCommandCC name
      {
        nativeBuildInputs = [
          environments.development
          git
        ];
        REPROML_DATA_DIR = mnist;
        REPROML_MIRROR = mnist;
        PYTHONDONTWRITEBYTECODE = 1;
        TORCH_CPP_LOG_LEVEL = "ERROR"; # the sandbox has no names of hosts, which is only a warning
        # Workers of a training on several processes talk through the loopback interface.
        __darwinAllowLocalNetworking = true;
      }
      ''
        cp -r ${files} sources && chmod -R u+w sources && cd sources
        export HOME="$TMPDIR" PYTHONPATH="$PWD"
        if [ -e reproml/arithmetic ]; then # the loops are those of the package
          python -m zipfile -e ${reproml.wheel}/*.whl "$TMPDIR/wheel"
          cp "$TMPDIR"/wheel/reproml/arithmetic/_kernels* reproml/arithmetic
        fi
        ${command}
        touch $out
      '';
  inFiles =
    name: files:
    inCopy name (
      lib.fileset.toSource {
        inherit root;
        fileset = files;
      }
    );
  pythonFiles = lib.fileset.fileFilter (file: file.hasExt "py") root;
in
{
  # They read documents, workflows and examples too.
  tests = inCopy "tests" source "pytest --hypothesis-profile=ci";

  # That requirements.lock, nix/, flake.lock, recipes and golden files agree.
  lock = inFiles "lock" (union [
    pythonFiles
    ../.github
    ../flake.lock
    ../flake.nix
    ../golden
    ../nix
    ../pyproject.toml
    ../reproml
    ../requirements.lock
  ]) "pytest tests/test_flake.py";

  lint = inFiles "lint" (union [
    pythonFiles
    ../.clang-format
    ../.clang-tidy
    ../flake.nix
    ../nix
    ../pyproject.toml
    ../reproml
  ]) "invoke lint && ${lib.getExe format} --check";

  matrix-digits-mlp =
    runCommand "matrix-digits-mlp"
      {
        nativeBuildInputs = [ reproml.without ];
        __darwinAllowLocalNetworking = true;
      }
      ''
        export HOME="$TMPDIR" TERM=dumb
        mkdir golden && cp ${../golden/digits-mlp.json} golden/digits-mlp.json
        reproml matrix --recipe ${../reproml/pipeline/recipes/digits-mlp.toml} | tee $out
      '';
}
