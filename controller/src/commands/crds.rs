//! `portolan crds`

use std::io::Write as _;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use portolan_controller::validate::schema;

const LONG: &str = "\
Prints the CustomResourceDefinitions of the six kinds of networking.istio.io that Portolan reads (ServiceEntry, \
WorkloadEntry, VirtualService, DestinationRule, Gateway, Sidecar), for clusters without Istio. They are the schemas that \
`portolan validate` checks against, and accept and refuse what Istio's own do.

Where Istio is installed its own CRDs are there already, and are the ones to keep.";

const EXAMPLES: &str = "\
Examples:
  portolan crds | kubectl apply --server-side -f -
  portolan crds --output json | jq '.items[].metadata.name'";

/// Print the CustomResourceDefinitions, for clusters without Istio
#[derive(Args)]
#[command(long_about = LONG, after_long_help = EXAMPLES, after_help = "See --help for examples.")]
pub struct Crds {
    /// yaml: one document each; json: one List
    #[arg(long, value_enum, default_value = "yaml")]
    output: Output,
}

#[derive(Clone, Copy, ValueEnum)]
enum Output {
    Yaml,
    Json,
}

impl Crds {
    /// Prints them.
    pub fn run(self) -> ExitCode {
        match self.text().and_then(|text| Ok(std::io::stdout().write_all(text.as_bytes())?)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("portolan: {error:#}");
                ExitCode::FAILURE
            }
        }
    }

    fn text(&self) -> anyhow::Result<String> {
        // Read and written again: anchors are for people, and not every tool resolves them.
        let mut items = Vec::new();
        for crd in schema::CRDS {
            items.push(serde_yaml_ng::from_str::<serde_json::Value>(crd)?);
        }
        match self.output {
            Output::Json => {
                let list = serde_json::json!({ "apiVersion": "v1", "kind": "List", "items": items });
                Ok(serde_json::to_string_pretty(&list)? + "\n")
            }
            Output::Yaml => {
                let documents = items.iter().map(serde_yaml_ng::to_string).collect::<Result<Vec<_>, _>>()?;
                Ok(documents.into_iter().map(|document| format!("---\n{document}")).collect())
            }
        }
    }
}
