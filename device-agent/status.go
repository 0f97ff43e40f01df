package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/jetbridge/jetbridge/shared/report"
	"github.com/jetbridge/jetbridge/shared/wellknown"
)

// statusCommand shows the newest report to people and scripts.
func statusCommand() *cobra.Command {
	var output, path, device string
	c := &cobra.Command{Use: "status", Short: "Show the device's pods", Args: cobra.NoArgs}
	c.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	c.Flags().StringVar(&path, "report", wellknown.ReportPath, "the report to show")
	c.Flags().StringVar(&device, "device-name", "", "the device's name; empty: what the agent found")
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		text, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return errors.New("there is no report yet; is jetbridge-agent.service running?")
		}
		if err != nil {
			return fmt.Errorf("cannot read the report: %w", err)
		}
		if device == "" {
			name, err := os.ReadFile(filepath.Join(filepath.Dir(path), deviceNameFile))
			if err != nil {
				return fmt.Errorf("cannot find the device's name: %w", err)
			}
			device = strings.TrimSpace(string(name))
		}
		r, err := report.Decode(string(text), device)
		if err != nil {
			return err
		}
		if output == "json" {
			e := json.NewEncoder(cmd.OutOrStdout())
			e.SetIndent("", "  ")
			return e.Encode(r)
		}
		if output != "table" {
			return fmt.Errorf("output %q is not known; use table or json", output)
		}
		w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 4, 2, ' ', 0)
		fmt.Fprintf(w, "DEVICE\tAGENT\tOBSERVED\tAPPLIED\tREPORT\n%s\t%s\t%d\t%d\t%d\n", r.Device, r.AgentVersion, r.Observed, r.Applied, r.Sequence)
		if r.LastError != nil {
			fmt.Fprintf(w, "\nLAST ERROR\n%s: %s\n", r.LastError.Reason, r.LastError.Message)
		}
		fmt.Fprint(w, "\nNAMESPACE\tPOD\tCONTAINER\tSTATE\tRESTARTS\tPHASE\n")
		for _, p := range r.Pods {
			if len(p.Status.ContainerStatuses) == 0 {
				fmt.Fprintf(w, "%s\t%s\t\t%s\t\t%s\n", p.Namespace, p.Name, p.Status.Reason, p.Status.Phase)
			}
			for _, k := range append(p.Status.InitContainerStatuses, p.Status.ContainerStatuses...) {
				state := "Waiting"
				switch {
				case k.State.Running != nil:
					state = "Running"
				case k.State.Terminated != nil:
					state = fmt.Sprintf("%s (%d)", k.State.Terminated.Reason, k.State.Terminated.ExitCode)
				case k.State.Waiting != nil:
					state = k.State.Waiting.Reason
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%s\n", p.Namespace, p.Name, k.Name, state, k.RestartCount, p.Status.Phase)
			}
		}
		return w.Flush()
	}
	return c
}
