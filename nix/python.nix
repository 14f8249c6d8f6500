# All of requirements.lock in one virtual environment: Nix fetches the wheels of wheels.json, Python's
# own venv and pip install them. One tree, so that libraries find each other in it.
{
  lib,
  stdenv,
  autoPatchelfHook,
  fetchPypi,
  fetchurl,
  linkFarm,
  python39,
  zlib,
  cuda ? false,
}:
assert lib.versionAtLeast python39.version "3.9.19";
let
  inherit (stdenv.hostPlatform) isLinux system;

  # NAME-VERSION-PYTHON-ABI-PLATFORM.whl, in the words of fetchPypi.
  fetchLocked =
    file: sha256:
    let
      part = lib.elemAt (lib.splitString "-" (lib.removeSuffix ".whl" file));
    in
    fetchPypi {
      inherit sha256;
      format = "wheel";
      pname = part 0;
      version = part 1;
      dist = part 2;
      python = part 2;
      abi = part 3;
      platform = part 4;
    };

  locked = lib.mapAttrs fetchLocked (lib.importJSON ./wheels.json).${system};

  # On Linux x86_64 the locked PyTorch is the CUDA one. The same version for the CPU alone, a tenth of
  # the size, has its own site; the other systems' locked one is for the CPU anyway.
  fetchCpu =
    file: sha256:
    fetchurl {
      inherit sha256;
      name = file;
      url = "https://download.pytorch.org/whl/cpu/${lib.replaceStrings [ "+" ] [ "%2B" ] file}";
    };
  cpuOnly = lib.mapAttrs fetchCpu {
    "torch-2.8.0+cpu-cp39-cp39-manylinux_2_28_x86_64.whl" =
      "bda4f93d64dcd9ae5d51844bbccc6fcb7d603522bcc95d256b5fe3bdb9dccca3";
    "torchvision-0.23.0+cpu-cp39-cp39-manylinux_2_28_x86_64.whl" =
      "c879590294471ffa6dca8ae2115c08351dde3b674fa271dd3b175f2de508a80a";
  };
  needsCuda =
    file:
    lib.any (prefix: lib.hasPrefix prefix file) [
      "nvidia_"
      "torch-"
      "torchvision-"
      "triton-"
    ];

  wheels =
    if system == "x86_64-linux" && !cuda then
      lib.filterAttrs (file: _: !needsCuda file) locked // cpuOnly
    else
      locked;
in
stdenv.mkDerivation {
  name = "reproml-python-${if cuda then "cuda" else "cpu"}";

  # Wheels bring their own libraries but for the C++ runtime and zlib.
  nativeBuildInputs = lib.optional isLinux autoPatchelfHook;
  buildInputs = lib.optionals isLinux [
    stdenv.cc.cc.lib
    zlib
  ];
  # What CUDA opens by name at run time: the libraries' own neighbours, and NixOS's driver.
  appendRunpaths = lib.optionals cuda [
    "$ORIGIN"
    "/run/opengl-driver/lib"
  ];
  # The driver comes with the machine; cuFile's InfiniBand libraries are for those who have InfiniBand.
  autoPatchelfIgnoreMissingDeps = lib.optionals cuda [
    "libcuda.so.1"
    "libibverbs.so.1"
    "libmlx5.so.1"
    "librdmacm.so.1"
  ];

  dontUnpack = true;
  # Leave the files as their wheels have them: pip has seen to the scripts.
  dontPatchShebangs = true;
  dontStrip = true;
  installPhase = ''
    ${python39.interpreter} -m venv $out
    $out/bin/pip install --no-index --no-deps --no-cache-dir ${linkFarm "wheels" wheels}/*.whl
  '';
  doInstallCheck = true;
  installCheckPhase = ''
    $out/bin/pip check
    $out/bin/python -c "import sklearn, torch, torchvision"
  '';
}
