//! What `--help` says behind the options: first steps, and what some commands do beyond their line.

pub(super) const FIRST_STEPS: &str = "\
First steps:
  fealty-keys init --dir keys --name keys.example.org     make a provider in the folder keys
  fealty-keys serve --dir keys --listen 0.0.0.0:8443      run it
  export FEALTY_KEYS_PROFILE=keys/admin.json              who you are, for everything below
  fealty-keys customer create acme --policy-key acme.key
  fealty-keys cloud create north --kind maker --roots tpm-makers.pem
  fealty-keys cloud enroll north --certificate host-7.ek.der
  fealty-keys customer allow-cloud acme north
  fealty-keys reference learn --firmware-log F --layer-log L > values.json    on a host that you trust
  fealty-keys reference set acme values.json
  fealty-keys policy set acme policy.txt --policy-key acme.key
  fealty-keys volume create acme root
  fealty-keys volume exec acme root -- fealty-disk import root.img root.vol
  fealty-keys vm create acme payroll
  fealty-keys vm seal acme payroll --config payroll.json --out payroll.vm

Every command prints one line per thing; --json prints JSON, one document a line.
Exit codes: 0 done; 1 refused or failed, with one line that says why; 2 a wrong command line. `volume exec` ends with its
command's own code.";

pub(super) const EXEC_HELP: &str = "\
Example: fealty-keys volume exec acme root -- fealty-disk export root.vol root.img

What weakens, doubles or ends a volume needs a rule of the customer's policy that names it, and stands in the audit log before it is
done and after:
  volume.revert   fealty-disk snapshot revert            volume.clone    fealty-disk clone
  volume.rekey    fealty-disk rekey, serve --rekey       volume.erase    fealty-disk erase, fealty-keys volume retire
  volume.rewrap   fealty-disk rewrap
  permit (principal == Administrator::\"ann\", action in [Action::\"volume.rekey\", Action::\"volume.rewrap\"], resource);
  permit (principal, action == Action::\"volume.erase\", resource == Volume::\"scratch\");

A command that is cut off, even by a power cut, leaves a volume that opens; run it again and it goes on. If this program was killed with
it, the volume is free when the session is past (two minutes).";

pub(super) const RETIRE_HELP: &str = "\
For a volume whose file is lost, or lies where nobody reaches it. Where the file is at hand, erase both:
  fealty-keys volume exec acme root -- fealty-disk erase root.vol --force
The policy must permit volume.erase. A backup of the provider from before holds the keys still: destroy it too, or take a new one.

Example: fealty-keys volume retire acme root --force";
